"""The command `tome-server`: its flags, tables and pictures."""
