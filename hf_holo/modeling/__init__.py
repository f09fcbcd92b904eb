"""The models. These files travel with a checkpoint, so the folder is flat and imports nothing of the package around it."""
