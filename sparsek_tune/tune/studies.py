"""Who works at what: processes of one host or many agree on it through trials of Optuna studies that they share.

A claim is a running trial with a heartbeat. The studies are scratch, derived from the store: losing them loses no
measurement, and where they cannot be used, every process goes on by itself.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sqlite3
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import create_engine, event
from sqlalchemy.pool import NullPool

from sparsek_tune.problem import Device

INTERVAL = 5  # seconds between heartbeats of a claim
GRACE = 20  # seconds without one, after which who held it is taken for dead
_BUSY_SECONDS = 30.0
_LOCK = 0x73747564  # of PostgreSQL's advisory locks, "stud"

optuna.logging.set_verbosity(optuna.logging.WARNING)


class StudiesError(Exception):
    """The studies cannot be used (any more)."""


def path_beside(database: Path) -> Path:
    """The SQLite file of the studies that belong to the database file ``database``."""
    return database.with_name(f"{database.stem}.studies.db")


def fingerprint(device: Device) -> str:
    """A device in a study's name: its own name, and a hash of all the rest."""
    return f"{device.name} {sha256(json.dumps(device.as_dict(), sort_keys=True).encode()).hexdigest()[:8]}"


class Studies:
    """The studies at ``url`` (SQLAlchemy's). Every method may be called from any thread, and raises StudiesError.

    again: called with (study, trial) for every claim whose holder died, after the trial was failed.
    """

    def __init__(self, url: str, again: Callable[[optuna.Study, FrozenTrial], None] | None = None) -> None:
        self.url = url
        self._again = again
        self._held: dict[int, int] = {}  # claimed trials, and their studies
        self._lock = threading.Lock()
        self._stop = threading.Event()
        try:
            self._storage = _storage(url, again)
        except Exception as error:  # of SQLAlchemy, Alembic, Optuna: whatever it is, the studies are of no use
            raise StudiesError(f"{_shown(url)} cannot be used as studies: {error}") from error
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, where: Path | str, again: Callable[[optuna.Study, FrozenTrial], None] | None = None) -> Studies:
        """Those of a store (``Store.where``): beside its file, or on its server."""
        return cls.beside(where, again) if isinstance(where, Path) else cls(where, again)

    @classmethod
    def beside(cls, database: Path, again: Callable[[optuna.Study, FrozenTrial], None] | None = None) -> Studies:
        """Those of a database file. A file that is none of this version's is put aside, as NAME.studies.db.old."""
        path = path_beside(database)
        url = f"sqlite:///{path}"
        try:
            if not path.exists():
                _make(path)
            elif not _ours(path):
                raise StudiesError(f"{path} holds no studies")
            return cls(url, again)
        except StudiesError:
            if not path.exists() or _held(path):
                raise
        except OSError as error:
            raise StudiesError(f"{path} cannot be made: {error}") from error
        try:
            path.replace(path.with_name(path.name + ".old"))
            for rest in ("-wal", "-shm"):
                path.with_name(path.name + rest).unlink(missing_ok=True)
            _make(path)
        except OSError as error:
            raise StudiesError(f"{path} cannot be renewed: {error}") from error
        return cls(url, again)

    def close(self) -> None:
        """Give back what is still held, as if its holder had died."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(StudiesError):
            for trial, study in sorted(self._held.items()):
                self.give_back(study, trial)
        self._storage.remove_session()
        self._storage.engine.dispose()

    def all(self) -> dict[str, dict[str, Any]]:
        """The attributes of every study, by its name, oldest first: in one go, however many there are."""
        return {study.study_name: study.user_attrs for study in self._do(self._storage.get_all_studies)}

    def study(self, name: str, attributes: Mapping[str, Any] | None = None) -> int:
        """The id of the study called ``name``, made with ``attributes`` where it is missing."""
        try:
            return self._storage.get_study_id_from_name(name)
        except KeyError:
            pass
        except Exception as error:
            raise self._error(error) from error
        try:
            study = self._storage.create_new_study([StudyDirection.MINIMIZE], name)
        except optuna.exceptions.DuplicatedStudyError:
            return self._do(self._storage.get_study_id_from_name, name)
        except Exception as error:
            raise self._error(error) from error
        for key, value in (attributes or {}).items():
            self.set(study, key, value)
        return study

    def set(self, study: int, key: str, value: Any) -> None:
        self._do(self._storage.set_study_user_attr, study, key, value)

    def attributes(self, study: int) -> dict[str, Any]:
        return self._do(self._storage.get_study_user_attrs, study)

    def add(
        self,
        study: int,
        attributes: Mapping[str, Any],
        values: Mapping[str, Any] | None = None,
        space: Mapping[str, BaseDistribution] | None = None,
    ) -> int:
        """A new trial, waiting; its id. values, space: its parameters."""
        trial = FrozenTrial(
            number=-1, trial_id=-1, state=TrialState.WAITING, value=None, datetime_start=None, datetime_complete=None,
            params=dict(values or {}), distributions=dict(space or {}), user_attrs=dict(attributes), system_attrs={},
            intermediate_values={},
        )  # fmt: skip
        return self._do(self._storage.create_new_trial, study, trial)

    def take(self, study: int, trial: int) -> bool:
        """Claim a waiting trial; False where another process was faster, or has taken it for dead."""
        self._do(self._storage.record_heartbeat, trial)  # first: killed in between, it would never be missed
        try:
            taken = self._storage.set_trial_state_values(trial, TrialState.RUNNING)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        except Exception as error:
            raise self._error(error) from error
        if taken:
            self._hold(study, trial)
        return taken

    def note(self, trial: int, key: str, value: Any) -> None:
        """Set an attribute of an open trial."""
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # taken for dead meanwhile
            self._do(self._storage.set_trial_user_attr, trial, key, value)

    def finish(self, trial: int, value: float | None) -> bool:
        """A claim is settled: with a value, or without (failed). False where others took its holder for dead before."""
        with self._lock:
            self._held.pop(trial, None)
        state, values = (TrialState.FAIL, None) if value is None else (TrialState.COMPLETE, [value])
        try:
            self._do(self._storage.set_trial_state_values, trial, state, values)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        return True

    def give_back(self, study: int, trial: int) -> None:
        """Fail a claim as if its holder had died, so that others may work at it."""
        if self.finish(trial, None) and self._again is not None:
            self._do(self._again, self._loaded(study), self._do(self._storage.get_trial, trial))

    def trials(self, study: int, *states: TrialState) -> list[FrozenTrial]:
        """Oldest first."""
        return self._do(self._storage.get_all_trials, study, deepcopy=False, states=states or None)

    def bury(self, study: int) -> None:
        """Fail the claims of the dead."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._do(optuna.storages.fail_stale_trials, self._loaded(study))

    def _loaded(self, study: int) -> optuna.Study:
        name = self._do(self._storage.get_study_name_from_id, study)
        return self._do(optuna.load_study, study_name=name, storage=self._storage)

    def _hold(self, study: int, trial: int) -> None:
        with self._lock:
            self._held[trial] = study

    def _beat(self) -> None:
        while not self._stop.wait(INTERVAL):
            with self._lock:
                held = sorted(self._held)
            for trial in held:
                with contextlib.suppress(Exception):  # the thread that works at it will meet the same error
                    self._storage.record_heartbeat(trial)

    def _do(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except optuna.exceptions.UpdateFinishedTrialError:
            raise
        except Exception as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> StudiesError:
        cause = error.__cause__ or error
        return StudiesError(f"the studies {_shown(self.url)} failed: {cause}".splitlines()[0])


def _storage(url: str, again: Callable[[optuna.Study, FrozenTrial], None] | None) -> RDBStorage:
    file = url.startswith("sqlite")
    # sqlite3 must not begin transactions by itself: see _immediately. Of a server, too, the studies may be lost.
    options: dict[str, Any] = {"connect_args": {"timeout": _BUSY_SECONDS, "isolation_level": None}}
    if not file:
        options = {
            "connect_args": {"connect_timeout": 10, "options": "-c synchronous_commit=off"},
            "pool_pre_ping": True,
        }
    callback: Any = "heartbeat_stale_trial_callback"
    if callback not in inspect.signature(RDBStorage).parameters:  # before Optuna 4.9
        callback = "failed_trial_callback"
    dead: Any = {callback: again}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        with contextlib.nullcontext() if file else _alone(url):
            storage = RDBStorage(url, options, heartbeat_interval=INTERVAL, grace_period=GRACE, **dead)
    if file:
        event.listen(storage.engine, "connect", _quick)
        event.listen(storage.engine, "begin", _immediately)
        storage.remove_session()
        storage.engine.dispose()  # connections that were made before
    return storage


@contextlib.contextmanager
def _alone(url: str) -> Iterator[None]:
    """Optuna makes its tables: one process at a time, or they get in each other's way."""
    engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": 10})
    with engine.begin() as connection:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        yield


def _quick(connection: Any, _: Any) -> None:
    """The studies may be lost, with the power; the database may not."""
    connection.execute("PRAGMA synchronous = OFF")


def _immediately(connection: Any) -> None:
    """Optuna reads before it writes: a transaction that begins as a reader may be refused the upgrade."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _make(path: Path) -> None:
    """A new file, put in place as a whole, or not at all where another process was faster."""
    from sparsek_tune.db.sqlite import is_network

    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".new", dir=path.parent)
    os.close(handle)
    try:
        storage = _storage(f"sqlite:///{name}", None)
        storage.remove_session()
        storage.engine.dispose()
        if not is_network(path):
            with contextlib.closing(sqlite3.connect(name)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    except (OSError, sqlite3.Error):
        raise
    except Exception as error:
        raise OSError(str(error)) from error
    finally:
        for rest in ("", "-wal", "-shm"):
            Path(name + rest).unlink(missing_ok=True)


def _ours(path: Path) -> bool:
    """Whether the file is one of Optuna's, which would otherwise add its tables to whatever it is."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT * FROM alembic_version, version_info").fetchone() is not None
    except sqlite3.Error as error:
        return (error.sqlite_errorcode & 0xFF) == sqlite3.SQLITE_BUSY


def _held(path: Path) -> bool:
    """Whether the file is a good one, as far as SQLite sees, that is only busy, or may not be written."""
    if not os.access(path, os.W_OK):
        return True
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=1.0)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            return False
    except sqlite3.Error as error:
        return (error.sqlite_errorcode & 0xFF) == sqlite3.SQLITE_BUSY


def _shown(url: str) -> str:
    """Without a password."""
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)
