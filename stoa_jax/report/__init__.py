"""A run's report: one self-contained HTML file from what its work directory holds."""

from stoa_jax.report.write import write_report

__all__ = ["write_report"]
