"""The small model that this project trained itself, and the recipe that trains it."""
