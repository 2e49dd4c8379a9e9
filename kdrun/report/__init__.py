"""Tables, statistics, curves and pages made of finished runs."""
