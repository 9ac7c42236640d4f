"""What this package gains on this machine: `vidaccel demo`."""
