"""What makes a folder with a checkpoint ready for the Hub: its code, its model card, and the way there."""
