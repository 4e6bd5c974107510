import os, sys, time, warnings, json, signal, inspect
warnings.filterwarnings("ignore")
import torch, timm, logging; logging.disable(logging.ERROR)
torch.set_num_threads(1)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from zoo.models_timm import RATES, _make
from zoo.entry import forward
class Slow(Exception): pass
def alarm(*a): raise Slow()
signal.signal(signal.SIGALRM, alarm)
import timm.models as tm
def sizes(names):
    out=[]
    for n in names:
        try:
            with torch.device("meta"): m=timm.create_model(n,pretrained=False)
            out.append((sum(p.numel() for p in m.parameters()),n,type(m).__name__))
        except Exception as e: print('meta',n,repr(e)[:100],file=sys.stderr)
    return sorted(out)
def accepted(name, options):
    """those rates the constructor takes"""
    took=[]
    for r in RATES:
        try:
            with torch.device("meta"): timm.create_model(name,pretrained=False,num_classes=10,**{r:.1},**options)
            took.append(r)
        except Exception: pass
    return took
def fits(name):
    for size in (32,64,96,112,128,160,192,224,256,None):
        for extra in ({},{"img_size":size}):
            if size is None:
                size=timm.models.get_pretrained_cfg(name).input_size[-1]; extra={}
            try:
                rates=None
                with torch.device("meta"): timm.create_model(name,pretrained=False,num_classes=10,**extra)
                signal.alarm(15)
                torch.manual_seed(0)
                m,i=_make(name,extra,size); m.train(); forward(m,i); m.eval()
                with torch.no_grad(): forward(m,i)
                return size,extra
            except Exception as e: err=repr(e)[:200]
            finally: signal.alarm(0)
    raise RuntimeError(err)
with open(sys.argv[1],"w") as f:
    mods=sorted({timm.models._registry._model_to_module[n] for n in timm.list_models()})
    for mod in mods:
        cand=sizes(timm.list_models(module=mod))
        picked=[]; seen=set()
        for s,n,c in cand:
            if s>45e6: break
            if c not in seen: picked.append(n); seen.add(c)
        for s,n,c in cand[1:]:
            if len(picked)<2 and n not in picked and s<30e6: picked.append(n)
        for n in picked[:3]:
            t=time.time()
            try:
                size,extra=fits(n); rates=accepted(n,extra)
                signal.alarm(20)
                m,i=_make(n,{r:.1 for r in rates}|extra,size); m.train(); t1=time.time(); forward(m,i); dt=time.time()-t1; m.eval(); forward(m,i)
                f.write("\t".join([n,",".join(rates),str(size),json.dumps(extra)])+"\n"); f.flush()
                print(mod,n,rates,size,extra,round(dt,3),flush=True)
            except BaseException as e: print('FAIL',mod,n,repr(e)[:200],flush=True)
            finally: signal.alarm(0)
