"""Results as tables and pages; studies."""
