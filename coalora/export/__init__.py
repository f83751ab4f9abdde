"""The bundle that answers any budget, PEFT adapters, and bases in the formats of engines."""
