"""Pure functions of arrays: retrieval, intervals, caption scores."""
