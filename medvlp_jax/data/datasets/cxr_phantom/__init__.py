"""Generated frontal chest radiographs with reports, boxes, masks and a patient table."""
