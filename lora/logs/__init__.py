"""What a run tells: its log, trackers, bars, pictures and videos."""
