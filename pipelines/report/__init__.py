"""The report of a pipeline: `report.html`, one file that needs no network, `report.md`, and its figures."""
