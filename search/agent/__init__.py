"""The process beside a device that serves it to searches elsewhere, and how a search speaks to it."""
