"""What the commands that train are made of: config, registry of methods, loop, run folder."""
