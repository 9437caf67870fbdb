"""The paper's figures, one module each: settings, run, claims, picture."""
