"""Loss and metric of configurations, and what a finished run is worth."""
