"""The gate and everything it computes with: torch and numpy only, pure."""
