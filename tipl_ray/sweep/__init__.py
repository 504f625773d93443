"""Many trainings side by side: what varies, how they are judged, and the comparison."""
