"""What all rooms stand on: settings, files, caches, processes. Imports nothing else of pc_clip."""
