-- Events of many hosts in PostgreSQL, 12 or newer. An event that arrives twice is stored once.
create table selfconn_events (body jsonb not null);

-- The key of an event. boot_id is null only where a host could not read it.
create unique index selfconn_events_key on selfconn_events (
    coalesce(body->>'boot_id', ''), (body->>'run'), ((body->>'seq')::bigint)
);

-- Times in UTC sort as text, too.
create index selfconn_events_time on selfconn_events ((body->>'time'));

create view selfconn as select
    (body->>'time')::timestamptz as time,
    body->>'event' as event,
    body->>'severity' as severity,
    body->>'host' as host,
    body->>'boot_id' as boot_id,
    body->>'run' as run,
    (body->>'seq')::bigint as seq,
    body->>'id' as id,
    (body->>'port')::integer as port,
    coalesce(body->>'exe', body->>'comm') as program,
    body->>'unit' as unit,
    body->>'container' as container,
    body
from selfconn_events;

-- Of each run: the events that are there, those that are missing, and those that its host counted as lost. A run
-- is complete if `missing` is what the host has lost itself (the log's and the suppressed ones).
create view selfconn_runs as select
    host, boot_id, run,
    min(time) as first, max(time) as last,
    count(*) as stored,
    max(seq) - count(*) as missing,
    coalesce(max((body->'lost'->>'log')::bigint + (body->'lost'->>'suppressed')::bigint)
        filter (where event = 'stopped'),
        sum((body->>'count')::bigint) filter (where event = 'lost' and body->>'where' in ('log', 'suppressed')),
        0) as lost_on_host,
    bool_or(event = 'stopped') as has_ended
from selfconn group by host, boot_id, run;
