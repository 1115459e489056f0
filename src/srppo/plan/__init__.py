"""What a run would need, before anything is downloaded or trained: `srppo run RECIPE --dry-run`."""
