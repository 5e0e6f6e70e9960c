-- As migrations/0002_races.sql.
CREATE TABLE race (
    id SERIAL PRIMARY KEY,
    measurement_id INTEGER NOT NULL REFERENCES measurement (id),
    default_ms DOUBLE PRECISION,
    tuned_ms DOUBLE PRECISION,
    created_at TEXT NOT NULL,
    known TEXT NOT NULL
);
CREATE INDEX ix_race_measurement ON race (measurement_id);

INSERT INTO race (measurement_id, default_ms, tuned_ms, created_at, known)
SELECT w.measurement_id, w.default_ms, w.tuned_ms,
    (SELECT max(m.created_at COLLATE "C") FROM measurement m
     WHERE (m.device_id, m.template_id, m.problem_id) = (w.device_id, w.template_id, w.problem_id)),
    (SELECT json_agg(json_build_object('host', r.host, 'pid', r.pid, 'started_at', r.started_at))::text
     FROM (SELECT DISTINCT run.host, run.pid, run.started_at
           FROM measurement m JOIN run ON run.id = m.run_id
           WHERE (m.device_id, m.template_id, m.problem_id) = (w.device_id, w.template_id, w.problem_id)
               AND m.status IN ('ok', 'static')) r)
FROM winner w
ORDER BY w.measurement_id;

CREATE TRIGGER race_is_never_changed BEFORE UPDATE OR DELETE OR TRUNCATE ON race
    FOR EACH STATEMENT EXECUTE FUNCTION refuse();
