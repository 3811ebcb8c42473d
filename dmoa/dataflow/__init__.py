"""What every long pass over rows on Ray Data shares: where rows come from, how engines stay full, who writes, how far it is."""
