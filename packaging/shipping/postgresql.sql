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

-- Of each run: the events that are stored, the missing ones before the last of these, and the ones that its host
-- counted as lost (the log's and the suppressed ones). What is missing at the end of a run can't be counted: a run with
-- `has_ended` has its end, and the one with `is_newest`, the host's latest, may still go on.
create view selfconn_runs as select
    host, boot_id, run,
    min(time) as first, max(time) as last,
    count(*) as stored,
    max(seq) - count(*) as missing,
    coalesce(max((body->'lost'->>'log')::bigint + (body->'lost'->>'suppressed')::bigint)
        filter (where event = 'stopped'),
        sum((body->>'count')::bigint) filter (where event = 'lost' and body->>'where' in ('log', 'suppressed')),
        0) as lost_on_host,
    bool_or(event = 'stopped') as has_ended,
    min(time) = max(min(time)) over (partition by host) as is_newest
from selfconn group by host, boot_id, run;
