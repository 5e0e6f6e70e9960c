"""The database of measurements and winners: ``store`` writes (SQLAlchemy), ``reader`` serves (standard library)."""
