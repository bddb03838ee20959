"""The boundary to the process that owns the device."""
