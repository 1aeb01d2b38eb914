-- Events of many hosts in ClickHouse. An event that arrives twice is merged: read with FINAL.
CREATE TABLE selfconn_events
(
    body String,
    time DateTime64(9, 'UTC') MATERIALIZED parseDateTime64BestEffort(JSONExtractString(body, 'time'), 9, 'UTC'),
    event LowCardinality(String) MATERIALIZED JSONExtractString(body, 'event'),
    severity LowCardinality(String) MATERIALIZED JSONExtractString(body, 'severity'),
    host LowCardinality(String) MATERIALIZED JSONExtractString(body, 'host'),
    boot_id LowCardinality(String) MATERIALIZED JSONExtractString(body, 'boot_id'),
    run LowCardinality(String) MATERIALIZED JSONExtractString(body, 'run'),
    seq UInt64 MATERIALIZED JSONExtractUInt(body, 'seq'),
    port UInt16 MATERIALIZED JSONExtractUInt(body, 'port'),
    program String MATERIALIZED
        if(JSONExtractString(body, 'exe') != '', JSONExtractString(body, 'exe'), JSONExtractString(body, 'comm'))
)
ENGINE = ReplacingMergeTree
ORDER BY (boot_id, run, seq);
