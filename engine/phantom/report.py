"""stub"""
def write_report(case):
    return {"indication":"","findings":"","impression":""}, ()
