"""How much data and how many steps quality-tuning needs: trials, their table and their plot."""
