-- Measurements are facts: appended, never changed. Winners are derived from them and may be replaced.
PRAGMA application_id = 1397773387;

CREATE TABLE device (
    id INTEGER NOT NULL PRIMARY KEY,
    kind TEXT NOT NULL,
    cc INTEGER NOT NULL,
    name TEXT NOT NULL,
    sm_count INTEGER NOT NULL,
    smem INTEGER NOT NULL,
    l2 BIGINT NOT NULL,
    memory BIGINT NOT NULL,
    driver TEXT NOT NULL,
    cuda TEXT NOT NULL,
    triton TEXT NOT NULL,
    torch TEXT NOT NULL,
    UNIQUE (kind, cc, name, sm_count, smem, l2, memory, driver, cuda, triton, torch)
);

CREATE TABLE template (
    id INTEGER NOT NULL PRIMARY KEY,
    name TEXT NOT NULL,
    source_hash TEXT NOT NULL,
    space_version TEXT NOT NULL,
    UNIQUE (name, source_hash, space_version)
);

CREATE TABLE problem (
    id INTEGER NOT NULL PRIMARY KEY,
    dtype TEXT NOT NULL,
    d INTEGER NOT NULL,
    g INTEGER NOT NULL,
    gate TEXT NOT NULL,
    k INTEGER NOT NULL,
    w INTEGER NOT NULL,
    n INTEGER NOT NULL,
    rows INTEGER NOT NULL,
    UNIQUE (dtype, d, g, gate, k, w, n, rows)
);

CREATE TABLE config (
    id INTEGER NOT NULL PRIMARY KEY,
    "key" TEXT NOT NULL UNIQUE
);

CREATE TABLE run (
    id INTEGER NOT NULL PRIMARY KEY,
    command TEXT NOT NULL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    outcome TEXT NOT NULL CHECK (outcome IN ('running', 'done', 'interrupted', 'failed')),
    started_at TEXT NOT NULL,
    finished_at TEXT
);

CREATE TABLE measurement (
    id INTEGER NOT NULL PRIMARY KEY,
    run_id INTEGER NOT NULL REFERENCES run (id),
    device_id INTEGER NOT NULL REFERENCES device (id),
    template_id INTEGER NOT NULL REFERENCES template (id),
    problem_id INTEGER NOT NULL REFERENCES problem (id),
    config_id INTEGER NOT NULL REFERENCES config (id),
    status TEXT NOT NULL
        CHECK (status IN ('ok', 'infeasible', 'compile', 'timeout', 'runtime', 'wrong', 'static')),
    reason TEXT NOT NULL,
    median_ms DOUBLE,
    ci_low_ms DOUBLE,
    ci_high_ms DOUBLE,
    samples INTEGER NOT NULL,
    protocol TEXT NOT NULL,
    created_at TEXT NOT NULL
);
CREATE INDEX ix_measurement_key ON measurement (device_id, template_id, problem_id, config_id);

CREATE TRIGGER measurement_is_never_changed BEFORE UPDATE ON measurement
BEGIN
    SELECT RAISE(ABORT, 'measurements are append-only');
END;
CREATE TRIGGER measurement_is_never_deleted BEFORE DELETE ON measurement
BEGIN
    SELECT RAISE(ABORT, 'measurements are append-only');
END;

CREATE TABLE winner (
    device_id INTEGER NOT NULL REFERENCES device (id),
    template_id INTEGER NOT NULL REFERENCES template (id),
    problem_id INTEGER NOT NULL REFERENCES problem (id),
    measurement_id INTEGER NOT NULL REFERENCES measurement (id),
    default_ms DOUBLE,
    tuned_ms DOUBLE,
    static BOOLEAN NOT NULL,
    PRIMARY KEY (device_id, template_id, problem_id)
);
