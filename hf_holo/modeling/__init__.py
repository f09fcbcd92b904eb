"""The models. These files travel with a checkpoint, so the folder is flat and imports nothing from around it."""
