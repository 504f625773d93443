"""Predicted against true (Section 4): metrics, tables, figures and the report."""
