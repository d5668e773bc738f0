"""Files on this machine: the cache folder, files inside installed packages, and files that are written whole."""
