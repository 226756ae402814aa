"""The main job from text to scores, made of the commands that a user would type."""
