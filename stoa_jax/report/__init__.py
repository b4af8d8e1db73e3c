"""A run's report: one self-contained HTML file from the contents of its work directory."""

from stoa_jax.report.write import write_report

__all__ = ["write_report"]
