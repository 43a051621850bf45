"""From networks and images to numbers; every measurement has a room of its own."""
