# ESPnet's path.sh sources this file; nothing of the recipe's own needs a path.
