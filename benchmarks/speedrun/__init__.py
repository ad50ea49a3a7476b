"""A leaderboard of training times whose rows are proved: `docs/speedrun.md` has the rules."""
