"""Flow policies in LeRobot's folders: a prefix is read once, and an expert turns noise into actions."""
