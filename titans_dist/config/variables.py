"""Environment variables by which the launcher tells its workers what no configuration says."""

STARTED = "TITANS_DIST_STARTED"
"""Unix seconds at which the job began, where this process is not its first."""
FAULTS = "TITANS_DIST_FAULTS"
"""File with the faults of a drill."""
