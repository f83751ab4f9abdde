"""DVC: versions of configuration sets, and their restoration."""
