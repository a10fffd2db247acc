"""Daily activity, point-in-time features, labels and eligibility, as Ibis expressions."""
