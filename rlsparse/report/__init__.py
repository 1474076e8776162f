"""Reports: of a study (``study_page``) and of one checkpoint pair (``diff_page``)."""
