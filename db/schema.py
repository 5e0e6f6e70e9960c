"""The tables, for SQLAlchemy 2.0 and later. ``migrations/*.sql`` creates them on SQLite; a test holds the two equal."""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Double, ForeignKey, Index, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

STATUSES = ("ok", "infeasible", "compile", "timeout", "runtime", "wrong", "static")
OUTCOMES = ("running", "done", "interrupted", "failed")


def _one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    return CheckConstraint(f"{column} IN ({', '.join(map(repr, values))})")


class Base(DeclarativeBase):
    # Times of day are ISO 8601 text in UTC: they sort, and every reader understands them.
    type_annotation_map = {str: Text, float: Double}  # noqa: RUF012 (SQLAlchemy's spelling)


class DeviceRow(Base):
    """The whole fingerprint, versions included: another driver or Triton is another device."""

    __tablename__ = "device"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    cc: Mapped[int]
    name: Mapped[str]
    sm_count: Mapped[int]
    smem: Mapped[int]
    l2: Mapped[int] = mapped_column(BigInteger)
    memory: Mapped[int] = mapped_column(BigInteger)
    driver: Mapped[str]
    cuda: Mapped[str]
    triton: Mapped[str]
    torch: Mapped[str]
    __table_args__ = (
        UniqueConstraint("kind", "cc", "name", "sm_count", "smem", "l2", "memory", "driver", "cuda", "triton", "torch"),
    )


class TemplateRow(Base):
    __tablename__ = "template"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    source_hash: Mapped[str]
    space_version: Mapped[str]
    __table_args__ = (UniqueConstraint("name", "source_hash", "space_version"),)


class ProblemRow(Base):
    """A problem projected on the fields of a template: the fields it does not depend on are blank."""

    __tablename__ = "problem"
    id: Mapped[int] = mapped_column(primary_key=True)
    dtype: Mapped[str]
    d: Mapped[int]
    g: Mapped[int]
    gate: Mapped[str]
    k: Mapped[int]
    w: Mapped[int]
    n: Mapped[int]
    rows: Mapped[int]
    __table_args__ = (UniqueConstraint("dtype", "d", "g", "gate", "k", "w", "n", "rows"),)


class ConfigRow(Base):
    __tablename__ = "config"
    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(unique=True)


class RunRow(Base):
    """One tuning command. ``outcome`` stays "running" where the process was killed."""

    __tablename__ = "run"
    id: Mapped[int] = mapped_column(primary_key=True)
    command: Mapped[str]
    host: Mapped[str]
    pid: Mapped[int]
    outcome: Mapped[str]
    started_at: Mapped[str]
    finished_at: Mapped[str | None]
    __table_args__ = (_one_of("outcome", OUTCOMES),)


class MeasurementRow(Base):
    """One attempt at one config: appended, never changed (on SQLite, triggers see to it)."""

    __tablename__ = "measurement"
    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("run.id"))
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"))
    template_id: Mapped[int] = mapped_column(ForeignKey("template.id"))
    problem_id: Mapped[int] = mapped_column(ForeignKey("problem.id"))
    config_id: Mapped[int] = mapped_column(ForeignKey("config.id"))
    status: Mapped[str]
    reason: Mapped[str]
    median_ms: Mapped[float | None]
    ci_low_ms: Mapped[float | None]
    ci_high_ms: Mapped[float | None]
    samples: Mapped[int]
    protocol: Mapped[str]
    created_at: Mapped[str]
    __table_args__ = (
        _one_of("status", STATUSES),
        Index("ix_measurement_key", "device_id", "template_id", "problem_id", "config_id"),
    )


class RaceRow(Base):
    """A race that a measurement won: appended, never changed. ``known``: JSON, the runs that it took into account."""

    __tablename__ = "race"
    id: Mapped[int] = mapped_column(primary_key=True)
    measurement_id: Mapped[int] = mapped_column(ForeignKey("measurement.id"))
    default_ms: Mapped[float | None]
    tuned_ms: Mapped[float | None]
    created_at: Mapped[str]
    known: Mapped[str]
    __table_args__ = (Index("ix_race_measurement", "measurement_id"),)


class WinnerRow(Base):
    """The config that is served; derived from the races. One for every device, template and problem."""

    __tablename__ = "winner"
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"), primary_key=True)
    template_id: Mapped[int] = mapped_column(ForeignKey("template.id"), primary_key=True)
    problem_id: Mapped[int] = mapped_column(ForeignKey("problem.id"), primary_key=True)
    measurement_id: Mapped[int] = mapped_column(ForeignKey("measurement.id"))
    default_ms: Mapped[float | None]
    tuned_ms: Mapped[float | None]
    static: Mapped[bool]
