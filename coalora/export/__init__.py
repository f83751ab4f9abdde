"""PEFT adapters, packed bases and the bundle that answers any budget."""
