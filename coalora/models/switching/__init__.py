"""Weight switching: one resident model that takes any configuration."""
