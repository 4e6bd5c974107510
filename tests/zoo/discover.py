import os, sys, time, warnings, json, traceback, signal
os.environ["HF_HUB_OFFLINE"]="1"; os.environ["TRANSFORMERS_VERBOSITY"]="error"
warnings.filterwarnings("ignore")
import torch; torch.set_num_threads(1)
import transformers, logging
transformers.logging.set_verbosity_error(); logging.disable(logging.ERROR)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from zoo.models_hf import classes, make
from zoo.hf_configs import Shrink
from zoo.entry import forward, tensors
LEVELS=[("s32",True,32),("s64",True,64),("d64",False,64),("d224",False,224),("d0",False,None)]
class Slow(Exception): pass
def alarm(*a): raise Slow()
signal.signal(signal.SIGALRM, alarm)
def attempt(t,c,w,img):
    t0=time.time()
    torch.manual_seed(0)
    signal.alarm(12)
    try:
        m,i=make(t,c,Shrink(w,img))
        t1=time.time()
        m.train(); o=forward(m,i)
        t2=time.time()
        m.eval()
        with torch.no_grad(): forward(m,i)
        return round(t1-t0,3), round(t2-t1,3), sum(p.numel() for p in m.parameters()), bool(tensors(o))
    finally: signal.alarm(0)
def find(t):
    errs=[]
    start=time.time()
    for c in classes(t):
        for name,w,img in LEVELS:
            if time.time()-start>40: return None,errs
            try:
                return (c,name,*attempt(t,c,w,img)),errs
            except BaseException as e:
                if isinstance(e,KeyboardInterrupt): raise
                tb=traceback.extract_tb(e.__traceback__)
                where=[f for f in tb if 'zoo' not in f.filename]
                f=(where or tb)[-1]
                g=[x for x in tb if '/models/' in x.filename]
                g=g[-1] if g else f
                errs.append((c,name,type(e).__name__+": "+str(e)[:200], f"{os.path.basename(g.filename)}:{g.lineno}"))
    return None,errs
if __name__=="__main__":
    from transformers.models.auto import modeling_auto
    out=sys.argv[1]; 
    todo=sys.argv[2:] or sorted(set(modeling_auto.MODEL_MAPPING_NAMES)|set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    with open(out,"a") as f:
        for t in todo:
            r,e=find(t)
            f.write(json.dumps([t,r,e])+"\n"); f.flush()
