import numpy as np
from fakes import *
from holdfast.kvstore.residency import Tier

def put(service, effects, name, tokens, wp=WritePolicy.THROUGH):
    r=[]
    o=service.begin_ingest(CLIENT, DocumentId("default",name), tiny_spec().fingerprint(), np.asarray(tokens,dtype=np.uint32), wp, None, 64, FAR_NS, r.append)
    service.commit_ingest(CLIENT,o.id,r.append); effects.complete_all(service); service.state.check()
    return DocumentId("default",name)

def where(service, d):
    return [[p.tier.label for p in service.state.extents[e].placements()] for e in service.state.documents[d].document.extents]

def test_last_copy_is_a_drop():
    s,e,c=tiny_service(); d=put(s,e,"a",range(32))
    s.evict(d,Tier.NVME,0,FAR_NS,lambda x:None); e.complete_all(s)
    print([(v.tier,v.action,v.last_copy,v.restore_ns) for v in s.state.ledger.verdicts])
    assert where(s,d)==[[]]
    assert any(v.last_copy for v in s.state.ledger.verdicts)

def test_write_back_out_of_nvme():
    s,e,c=tiny_service(); d=put(s,e,"a",range(32),WritePolicy.BACK)
    done=[]
    s.evict(d,Tier.NVME,0,FAR_NS,done.append); e.complete_all(s)
    assert done==[None]
    assert where(s,d)==[[]]

def test_shared_pinned():
    s,e,c=tiny_service(); a=put(s,e,"a",range(64)); b=put(s,e,"b",range(32))
    s.pin(b,Tier.DDR,None,"me",""); e.complete_all(s)
    done=[]
    s.evict(a,Tier.DDR,0,FAR_NS,done.append); e.complete_all(s)
    print(where(s,a),where(s,b),done)
    assert "ddr" in where(s,b)[0]

def test_shared_pinned_bytes_pressure():
    s,e,c=tiny_service(); a=put(s,e,"a",range(64)); b=put(s,e,"b",range(32))
    s.pin(b,Tier.NVME,None,"me",""); e.complete_all(s)
    s.evict(a,Tier.NVME,0,FAR_NS,lambda x:None); e.complete_all(s)
    print(where(s,a),where(s,b))
    assert where(s,b)[0]

def test_pin_then_evict_while_write_in_flight():
    s,e,c=tiny_service(); a=put(s,e,"a",range(32),WritePolicy.BACK)
    done=[]
    s.evict(a,Tier.DDR,0,FAR_NS,done.append)
    s.pin(a,Tier.DDR,None,"me","")
    e.complete_all(s); s.tick(); e.complete_all(s)
    print(where(s,a),done)
    assert "ddr" in where(s,a)[0]

def test_pin_while_eviction_waits_for_lease_of_shared():
    s,e,c=tiny_service(); a=put(s,e,"a",range(32)); b=put(s,e,"b",range(32))
    at=s.attach(CLIENT,b,None,None,None,FAR_NS,lambda x:None)
    done=[]
    s.evict(a,Tier.DDR,0,FAR_NS,done.append)
    assert done==[]
    s.pin(a,Tier.DDR,None,"me","")
    s.detach(CLIENT,at.lease.id); e.complete_all(s)
    print(where(s,a),done)
    assert "ddr" in where(s,a)[0]
