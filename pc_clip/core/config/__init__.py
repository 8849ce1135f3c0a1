"""Settings, a file a script; `settings` has what they share."""
