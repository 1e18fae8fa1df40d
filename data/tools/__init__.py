"""Gallery, downloads, and the procedural shapes set."""
