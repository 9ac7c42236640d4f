"""Pictures, videos and sound: read as people see them, written, and shown in a notebook."""
