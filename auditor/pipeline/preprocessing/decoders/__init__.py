"""One file per library that decodes photographs."""
