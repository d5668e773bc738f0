"""Files and console: the cache folder, folders of installed packages, atomic writes, and safe printing."""
